import sys

from fastxm.cli import main

sys.exit(main())
