-- The rows of a site, in pages of PAGE_ROWS neighbouring slots: a field for each page that holds a row, named by its
-- number (4 bytes, little-endian). A page is a byte for each slot, 1 if it holds a row, then the rows, zeros where there
-- is none.
local PAGE_ROWS = 5
local PER_CALL = 2000 -- unpack fails from 8,000 values on

-- Calls `work` with up to PER_CALL of the items at a time.
local function in_calls(items, work)
  for first = 1, #items, PER_CALL do
    work({unpack(items, first, math.min(first + PER_CALL - 1, #items))})
  end
end

-- The rows of a page, or of none (false), by place 0 … PAGE_ROWS - 1.
local function rows_of(page, row_bytes)
  local rows = {}
  for place = 0, page and PAGE_ROWS - 1 or -1 do
    if string.byte(page, place + 1) == 1 then
      local at = PAGE_ROWS + place * row_bytes
      rows[place] = string.sub(page, at + 1, at + row_bytes)
    end
  end
  return rows
end

-- The page of such rows; nil if there are none.
local function page_of(rows, row_bytes)
  local parts, void, any = {}, string.rep('\0', row_bytes), false
  for place = 0, PAGE_ROWS - 1 do
    any = any or rows[place]
    parts[place + 1] = rows[place] and '\1' or '\0'
    parts[PAGE_ROWS + place + 1] = rows[place] or void
  end
  return any and table.concat(parts) or nil
end

-- Takes a session of an older format over, which had a field for each row.
local function upgrade()
  for _, key in ipairs(rows_keys()) do
    local pages, numbers, row_bytes = {}, {}, 0
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      local slot = struct.unpack('<I4', fields[i])
      local number = math.floor(slot / PAGE_ROWS)
      if not pages[number] then
        pages[number] = {}
        numbers[#numbers + 1] = number
      end
      pages[number][slot % PAGE_ROWS] = fields[i + 1]
      row_bytes = #fields[i + 1]
    end
    redis.call('DEL', key)
    in_calls(numbers, function(some)
      local values = {}
      for _, number in ipairs(some) do
        values[#values + 1] = struct.pack('<I4', number)
        values[#values + 1] = page_of(pages[number], row_bytes)
      end
      redis.call('HSET', key, unpack(values))
    end)
  end
  redis.call('HSET', KEYS[1], 'format', FORMAT)
end
