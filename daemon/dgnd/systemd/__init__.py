"""What the service manager is told, and what it asks for."""
