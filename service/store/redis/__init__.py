"""The session store in Redis or Valkey: `store` implements the contract, the other modules are its parts."""
