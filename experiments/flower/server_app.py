"""The app of the server."""

from fedtune.flower import server_app

app = server_app()
