"""The tests. `tests.cases` and `tests.contract` are what a new op's test file is made of."""
