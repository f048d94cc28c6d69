"""The gateway: validates requests, routes them to the services and streams events back. Arrives with the services."""
