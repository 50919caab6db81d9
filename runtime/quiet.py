"""Ctrl-C ends a program at once, without a traceback, until `one_line_errors` takes over.

A program imports this before all else: the packages take seconds to load.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:   # an ignored one stays so
    signal.signal(signal.SIGINT, signal.SIG_DFL)
