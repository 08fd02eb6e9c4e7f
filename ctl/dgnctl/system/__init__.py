"""`dgnctl system`: dgnd as a service of systemd."""
