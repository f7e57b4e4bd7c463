"""Looking at a running process: a socket for `userfault watch`, and a Prometheus collector.

`serve()` opens the socket, `stop()` closes it, `snapshot()` is what is sent through it. The collector is
`userfault.observe.prometheus.Collector`, which needs `prometheus_client`.

Everything is read when somebody asks. Reading takes no lock that a page fault could hold; but it is Python, and
while a thread waits for a page with the GIL held no Python runs: answers then come late, never wrong.
"""

from userfault.observe._server import serve, serve_where_asked, stop
from userfault.observe._snapshot import snapshot

__all__ = ["serve", "serve_where_asked", "snapshot", "stop"]
