-- Delete every key of a session, and leave a tombstone: a lease from before neither commits nor creates the session.
--
-- KEYS  the meta hash.  ARGV  the version that the session must have, or '', then sites that may have rows although the
--       meta hash does not name them.
-- Returns {verdict, detail}: {'done', whether there was a session, the fields `archived` and `file`, or nil},
--         {'format', the format found} or {'conflict', the version found}.
local stored = redis.call('HMGET', KEYS[1], 'format', 'version')
if not known(stored[1]) then
  return {'format', stored[1]}
end
if ARGV[1] ~= '' and (stored[2] or '0') ~= ARGV[1] then
  return {'conflict', stored[2] or '0'}
end
local existed = redis.call('EXISTS', KEYS[1], LOG) > 0 -- a damaged session has no meta hash
local archived = redis.call('HMGET', KEYS[1], 'archived', 'file')
erase()
for i = 2, #ARGV do
  redis.call('UNLINK', HOME .. 'rows:' .. ARGV[i])
end
return {'done', existed and '1' or '0', unpack(archived)}
