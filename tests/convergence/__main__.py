"""`python -m tests.convergence` trains; `python -m tests.convergence report` makes the page from what is kept."""

import sys

from tests.convergence import report, run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(report.main(arguments[1:]) if arguments[:1] == ["report"] else run.main(arguments))
