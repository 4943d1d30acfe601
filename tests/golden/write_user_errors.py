"""Write what users are told of wrong data to tests/golden/user_errors.txt (`make golden`)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "user_errors.txt"


def main() -> None:
    sys.path.insert(0, str(TESTS))
    from support.user_errors import collect_errors

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(collect_errors(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
