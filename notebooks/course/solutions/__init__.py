"""An answer to every exercise, a module a lesson. Spoilers."""
