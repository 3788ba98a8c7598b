"""Loaded by a node's setting `imports`: without its timer, MainProcess replaces a child only if it is notified of the child's end."""

from celery.concurrency.asynpool import AsynPool

AsynPool.timers = {}
