"""The HTTP edge: middleware, routes, the bodies of requests and replies."""
