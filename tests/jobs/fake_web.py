"""A web page for the tests of `attnlab up`: answers everything, and misbehaves as FAKE_WEB says."""

import http.server
import os
import signal
import sys


class Page(http.server.BaseHTTPRequestHandler):
    """Says yes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")


if __name__ == "__main__":
    behaviour = os.environ.get("FAKE_WEB", "")
    if behaviour == "dies":
        sys.exit("the page has no roof")
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    with http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Page) as server:
        server.serve_forever()
