"""Wrong answers that the checks must explain, a module a lesson."""
