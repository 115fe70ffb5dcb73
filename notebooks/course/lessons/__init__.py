"""The checks of the exercises, a module a lesson."""
