"""`python -m service` is `imprint`."""

from service.cli import main

if __name__ == "__main__":
    main()
