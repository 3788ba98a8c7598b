"""A result backend of somebody's own, that stores what it likes."""

from celery.backends.base import BaseBackend


class Backend(BaseBackend):
    """Nothing, that is."""

    def _store_result(self, task_id, result, state, **_):
        return result
