"""`python -m ood_fast` is `ood-fast`."""

import os
import sys

if __name__ == "__main__":
    # `python -m` puts the current folder first, where a PIL.py beside the data would run in the place of the package.
    if sys.path[:1] in ([""], [os.getcwd()]) and not os.path.samefile(os.path.dirname(os.path.dirname(__file__)), "."):
        del sys.path[0]
    from .cli import main

    sys.exit(main())
