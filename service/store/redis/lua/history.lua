-- Return a session, its log and its undo steps.
--
-- KEYS  the meta hash.  ARGV  number of log entries to read; '1' to read the undo steps, too.
-- Returns {the meta hash as field, value, ...; the newest log entries, oldest first; the undo steps, newest first, each
--         as {version, packed rows, packed meta values, text or ''}}.
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
