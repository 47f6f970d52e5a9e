"""Who calls what, when: settings, steps, Prefect flows, schedules and the command line."""
