"""The policy of a uvicorn. It is read after uvicorn's own configuration, because --env-file adds to the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from uvicorn.config import Config

from oomsafe.errors import ConfigError
from oomsafe.policy.settings import Policy, load_policy

#: How to give uvicorn a variable in time.
GIVE_IT = "give it to uvicorn, in the environment that it is started with or in its --env-file, or to oomsafe.uvicorn.run()"


def name_of(config: Config) -> str:
    """What the pool is called: the app's import path; empty for an app in code."""
    return config.app if isinstance(config.app, str) else ""


def read_policy(keywords: Mapping[str, Any]) -> tuple[Policy, list[str]]:
    """The policy, and warnings to log. For a setting that can't be right, prints one line on stderr and raises SystemExit."""
    try:
        return load_policy(os.environ, keywords)
    except ConfigError as error:
        print(f"oomsafe: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
