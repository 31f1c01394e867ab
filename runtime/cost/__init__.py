"""Pages per dollar: measured, modelled, simulated, compared and shown."""
