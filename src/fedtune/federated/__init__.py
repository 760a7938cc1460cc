"""The federated round: clients that train, and what becomes of what they send. Knows no model, no file and no run."""
