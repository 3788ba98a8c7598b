"""kombu's filesystem broker, whose messages are there whole or not at all: a node dies of one that it reads while it is written."""

from __future__ import annotations

import os
import time
import uuid

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes under a name that is no queue's, then gives the file its own. older kombus find a queue's name anywhere in a file's."""

    def _put(self, queue, payload, **kwargs):
        unique = uuid.uuid4()
        names = f"{unique}.part", f"{round(time.monotonic() * 1000)}_{unique}.{queue}.msg"
        partly, wholly = (os.path.join(self.data_folder_out, name) for name in names)
        with open(partly, "w") as file:
            file.write(dumps(payload))
        os.rename(partly, wholly)


filesystem.Transport.Channel = Channel
