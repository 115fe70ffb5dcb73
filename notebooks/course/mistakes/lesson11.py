"""Likely wrong answers of lesson 11."""

from __future__ import annotations

from course import mistake
from course.solutions.lesson11 import bytes_in_flight, threads_at_work


@mistake("11.1", "whole programs only")
def any_thread(registers, warps):
    return 65536 // registers


@mistake("11.1", "not threads")
def programs(registers, warps):
    return threads_at_work(registers, warps) // (32 * warps)


@mistake("11.2", "2 bytes each")
def numbers(H, warps, registers):
    return bytes_in_flight(H, warps, registers) // 2


@mistake("11.2", "one program")
def one_program(H, warps, registers):
    return 2 * H


@mistake("11.3", "8 to 32 are asked for")
def always_four(H):
    return 4 if H > 256 else 1


@mistake("11.3", "a power of two")
def not_a_power_of_two(H):
    return max(1, min(32, H // 512))
