"""`python -m weightport`."""

from .cli import main

raise SystemExit(main())
