"""`python -m prefloop`."""

from prefloop.cli import main

if __name__ == "__main__":  # processes that are spawned, as vLLM's are, import this file
    main()
