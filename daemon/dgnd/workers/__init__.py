"""dgnd's side of its worker processes; what runs inside one is `dgnd.worker`."""
