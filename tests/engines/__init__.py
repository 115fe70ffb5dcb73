"""Tests of `liger_patch`, on models small enough for a laptop's core."""
