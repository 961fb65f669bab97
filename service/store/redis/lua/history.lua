-- How a session came to be what it is.
--
-- KEYS  the meta hash.  ARGV  entries of the log to read; '1' to read what leads back, too.
-- Returns {meta as field, value, ...; the newest entries of the log, oldest first; for each version that can be undone,
--         newest first: version, rows, meta, text or nil}.
local count, undo = tonumber(ARGV[1]), {}
local stored = redis.call('HMGET', KEYS[1], 'version', 'undo_from')
local version = tonumber(stored[1] or 0)
if ARGV[2] == '1' then
  for v = version, tonumber(stored[2] or version) + 1, -1 do
    local parts = redis.call('HMGET', UNDO, v .. ':rows', v .. ':meta', v .. ':text')
    undo[#undo + 1] = {v, parts[1], parts[2], parts[3] or ''}
  end
end
return {redis.call('HGETALL', KEYS[1]), redis.call('LRANGE', LOG, -count, -1), undo}
