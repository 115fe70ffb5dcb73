"""The course's commands, from the project's root: `python -m notebooks run`, `python -m notebooks --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from course.commands import main

if __name__ == "__main__":
    sys.exit(main())
