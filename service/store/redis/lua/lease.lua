-- Renew a lease, or give it back, if it is still held.
--
-- KEYS  the meta hash.  ARGV  the lease, its duration in ms from now ('' = give the lease back).
-- Returns 1 if the lease was held, else 0.
if redis.call('GET', LEASE) ~= ARGV[1] then
  return 0
end
if ARGV[2] == '' then
  return redis.call('DEL', LEASE)
end
return redis.call('PEXPIRE', LEASE, ARGV[2])
