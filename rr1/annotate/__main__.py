"""`python -m rr1.annotate`."""
from rr1.annotate import main

if __name__ == "__main__":
    main()
