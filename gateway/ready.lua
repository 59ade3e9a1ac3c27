-- GET /ready: asks one endpoint of every pool how it is. The renderer puts READY_RPC, the path of a gRPC method
-- without input that answers a google.api.HttpBody, NOT_READY, the format of the error, and POOLS_KEY before this file;
-- the pools' names are under that key in the context of the route.

local request_id = envoy_on_request
local EMPTY_MESSAGE = "\0\0\0\0\0"
local FRAME_HEADER = 5

local function varint(bytes, at)
  local value, scale = 0, 1
  while true do
    local byte = string.byte(bytes, at)
    if byte == nil then
      return nil, at
    end
    value, scale, at = value + (byte % 128) * scale, scale * 128, at + 1
    if byte < 128 then
      return value, at
    end
  end
end

-- The data of the HttpBody inside one gRPC frame: field 2, after the content type.
local function http_body(frame)
  local at = FRAME_HEADER + 1
  while at <= #frame do
    local tag = string.byte(frame, at)
    local size
    size, at = varint(frame, at + 1)
    if size == nil then
      return nil
    end
    if tag == 0x12 then
      return string.sub(frame, at, at + size - 1)
    end
    at = at + size
  end
end

local function ask(handle, pool, id)
  local headers, frame = handle:httpCall(pool, {
    [":method"] = "POST", [":path"] = READY_RPC, [":authority"] = pool,
    ["content-type"] = "application/grpc", ["te"] = "trailers", ["x-request-id"] = id,
  }, EMPTY_MESSAGE, 2000)
  if headers[":status"] ~= "200" or frame == nil then
    return nil
  end
  return http_body(frame)
end

function envoy_on_request(handle)
  request_id(handle)
  local id = handle:headers():get("x-request-id")
  local head = handle:headers():get(":method") == "HEAD"
  local checks, failed, degraded = {}, {}, false
  for index, pool in ipairs(handle:filterContext():get(POOLS_KEY)) do
    local report = ask(handle, pool, id)
    local told = report and string.match(report, '^{"status":"(%a+)"')
    if told == "degraded" then
      degraded = true
    elseif told ~= "ok" then
      failed[#failed + 1] = pool
    end
    checks[index] = string.format('"%s":%s', pool, report or '{"status":"unavailable"}')
  end
  local list = table.concat(checks, ",")
  local status, body = "200", string.format('{"status":"%s","checks":{%s}}', degraded and "degraded" or "ok", list)
  if #failed > 0 then
    status = "503"
    local names = table.concat(failed, ", ")
    body = string.format(NOT_READY, names, id, names)
    body = string.sub(body, 1, -2) .. string.format(',"status":"unavailable","checks":{%s}}', list)
  end
  local headers = { [":status"] = status, ["content-type"] = "application/json" }
  if status == "503" then
    headers["retry-after"] = "1"
  end
  handle:streamInfo():dynamicMetadata():set(NAMESPACE, VERBATIM, "yes")
  handle:respond(headers, head and "" or body)
end

envoy_on_response = nil
