-- Return the names of the commands that the user of this connection may not run.
--
-- ARGV  the commands, each as a JSON list with arguments.
-- Returns {name, ...}; nothing on a server that cannot tell.
local lacking = {}
for _, words in ipairs(redis.acl_check_cmd and ARGV or {}) do
  local command = cjson.decode(words)
  local known, allowed = pcall(redis.acl_check_cmd, unpack(command))
  if not (known and allowed) then
    lacking[#lacking + 1] = command[1]
  end
end
return lacking
