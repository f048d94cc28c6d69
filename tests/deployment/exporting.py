"""A service whose collector is gone: its work ends at SIGTERM, and then it tries to export for two seconds."""

import signal
import time
from threading import Event

stopped = Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
print('{"event": "listening", "address": "127.0.0.1:1"}', flush=True)
stopped.wait()
print('{"event": "stopped"}', flush=True)
time.sleep(2)
