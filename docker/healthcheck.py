"""The health check of the container: exit code 0 if the server answers 200 on /readyz, else 1.

Uses the standard library only, so that a check starts fast.
"""

import http.client
import os
import sys

# An address that means "every interface" is reached through the loopback interface.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    host = os.environ.get("IMPRINT_HOST", "127.0.0.1")
    port = int(os.environ.get("IMPRINT_PORT", "8000"))
    connection = http.client.HTTPConnection(LOOPBACK.get(host, host), port, timeout=4)
    try:
        connection.request("GET", "/readyz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer on port {port}: {error}")
        return 1
    print(f"/readyz answered {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
