-- Renews a lease for ARGV[2] ms, or gives it back (''), if it is still held.
--
-- KEYS  the meta hash.  ARGV  the lease, ms.
-- Returns 1 if it was held, else 0.
if redis.call('GET', LEASE) ~= ARGV[1] then
  return 0
end
if ARGV[2] == '' then
  return redis.call('DEL', LEASE)
end
return redis.call('PEXPIRE', LEASE, ARGV[2])
