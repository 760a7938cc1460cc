"""The app of each site."""

from fedtune.flower import client_app

app = client_app()
