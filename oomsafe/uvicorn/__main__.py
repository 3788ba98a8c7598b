"""``python -m oomsafe.uvicorn``: uvicorn's own command line, its workers guarded. The policy comes from OOMSAFE_ variables."""

from __future__ import annotations

from oomsafe.uvicorn.launch import main

if __name__ == "__main__":
    main()
