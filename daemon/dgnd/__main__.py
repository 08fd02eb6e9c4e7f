"""`python -m dgnd`."""

from dgnd.main import main

main()
