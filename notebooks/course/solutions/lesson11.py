"""Answers of lesson 11."""

from __future__ import annotations

from course import solution


@solution("11.1")
def threads_at_work(registers, warps):
    programs = min(65536 // (registers * 32 * warps), 2048 // (32 * warps))
    return programs * 32 * warps


@solution("11.2")
def bytes_in_flight(H, warps, registers):
    return threads_at_work(registers, warps) // (32 * warps) * 2 * H


@solution("11.3")
def warps_for(H):
    block = 1 << (H - 1).bit_length()
    return max(1, min(32, block // 512))
