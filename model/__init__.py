"""The model: functions of slow weights, fast weights and tokens; no web, store, environment or network."""
