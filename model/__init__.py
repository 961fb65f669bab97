"""The model: functions of slow weights, fast weights and tokens, without web, store, environment or network."""
