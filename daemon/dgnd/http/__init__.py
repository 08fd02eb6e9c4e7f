"""The HTTP API, where `[http] listen` asks for it. Nothing else imports this package, nor what it needs."""
