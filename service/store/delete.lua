-- Deletes every key of a session, if it is of this format.
--
-- KEYS  the meta hash.  ARGV  format, the prefix of its row hashes (same hash tag, so the same cluster slot).
-- Returns {verdict, detail}: {'done', whether there was a session} or {'format', the format found}.
local meta = redis.call('HGETALL', KEYS[1])
local format = redis.call('HGET', KEYS[1], 'format')
if format and format ~= ARGV[1] then
  return {'format', format}
end
for i = 1, #meta, 2 do
  local site = string.match(meta[i], '^site:(.*)$')
  if site then
    redis.call('UNLINK', ARGV[2] .. site)
  end
end
return {'done', tostring(redis.call('UNLINK', KEYS[1]))}
