"""A program in a pseudo-terminal: keys go in, what it shows is waited for. Unix only."""

import os
import re
import select
import signal
import struct
import subprocess
import time

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]|\r")


class Terminal:
    """One program and the terminal that it runs in."""

    def __init__(self, command, folder, environment, rows=30, columns=110):
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        def own_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            # A job that a shell runs in the background ignores Ctrl-C, and so would all that it starts.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_terminal,  # noqa: PLW1509 - no threads here
        )
        os.close(slave)
        self._bytes = b""
        self._seen = 0

    @property
    def shown(self):
        """What was shown behind the last text that was expected, without colours and movements of the cursor."""
        return ANSI.sub("", self._bytes.decode("utf-8", "replace"))[self._seen :]

    def expect(self, text, seconds=180):
        """Wait until `text` was shown; returns what came before it. AssertionError with what was shown when it does not come."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} was not shown in {seconds} s, but {self.shown[-3000:]!r}"
            assert self._read(end - time.monotonic()) or text in self.shown, f"ended without {text!r}: {self.shown[-3000:]!r}"
        before = self.shown.partition(text)[0]
        self._seen += len(before) + len(text)
        return before

    def expect_more(self, characters, seconds=180):
        """Wait until so many characters more were shown."""
        end = time.monotonic() + seconds
        while len(self.shown) < characters:
            assert time.monotonic() < end and self._read(end - time.monotonic()), self.shown[-3000:]
        self._seen += len(self.shown)

    def _read(self, seconds):
        """Take in what is there; False when the program has ended."""
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: the other end is closed
            return False
        self._bytes += data
        return bool(data)

    def send(self, keys):
        os.write(self.master, keys.encode("utf-8"))

    def line(self, text):
        """Type a text and Enter."""
        self.send(text + "\r")

    def interrupt(self):
        """Ctrl-C: a key, or a signal, as the program has set its terminal."""
        self.send("\x03")

    def interrupt_for(self, text, seconds=10):
        """Ctrl-C at the prompt of a plain `input()`, until `text` is shown. A signal that arrives after CPython has shown the prompt and
        before it waits for keys is noticed at the end of the line only: after `seconds` it ends."""
        self.interrupt()
        end = time.monotonic() + seconds
        while text not in self.shown and time.monotonic() < end and self._read(end - time.monotonic()):
            pass
        if text not in self.shown:
            self.send("\r")
        self.expect(text)

    def wait(self, seconds=60):
        """The exit status; what is still shown is read meanwhile."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.2)
        return self.process.poll()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
