-- Replace what is kept of a session by a stub, once an archive has the session.
--
-- KEYS  the meta hash.  ARGV  name of the archived file, nonce of the commit that the file has, the field `archived` of
--       the stub, then the sites that the file has.
-- Returns 'done', or what kept the session as it is: 'late' (the right to archive the session has expired), 'changed'
--         or 'busy' (a turn has the lease).
local stored = redis.call('HMGET', KEYS[1], 'format', 'nonce')
if redis.call('GET', ARCHIVING) ~= ARGV[1] then
  return 'late'
end
if stored[1] ~= FORMAT or stored[2] ~= ARGV[2] then
  return 'changed'
end
if redis.call('EXISTS', LEASE) == 1 then
  return 'busy'
end
local fields, stub = {'version', 'created', 'nonce', 'options', 'once_until', 'once_lost'}, {}
for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(fields))) do
  if value then
    stub[#stub + 1], stub[#stub + 2] = fields[i], value
  end
end
local life = redis.call('PTTL', KEYS[1])
redis.call('UNLINK', LOG, UNDO, ARCHIVING, KEYS[1], unpack(rows_keys()))
-- A new hash: one that was large stays in the form that large hashes have.
redis.call('HSET', KEYS[1], 'format', ARCHIVED, 'archived', ARGV[3], unpack(stub))
if life > 0 then
  redis.call('PEXPIRE', KEYS[1], life)
end
return 'done'
