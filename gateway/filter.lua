-- Gives each request its id, and writes errors that services describe in metadata as HTTP answers.
-- The renderer puts STATUS before this file: gRPC status -> {status, code, detail, retry_after} for errors
-- that come without a description.

local find, format, byte = string.find, string.format, string.byte

local PASSED_ON = {
  "content-range", "retry-after", "server-timing", "x-ratelimit-remaining-requests",
  "x-ratelimit-remaining-tokens",
}

local random = assert(io.open("/dev/urandom", "rb"))
random:setvbuf("full", 4096)

local HEX_16 = string.rep("%02x", 16)

function envoy_on_request(handle)
  local headers = handle:headers()
  local id = headers:get("x-request-id")
  if id == nil or id == "" or #id > 128 or find(id, "[^%w%-._:/+=@]") then
    headers:replace("x-request-id", format(HEX_16, byte(random:read(16), 1, 16)))
  end
end

local function described(map)
  return map:get("sf-http-status"), map:get("sf-http-body")
end

-- A file that is streamed: the transcoder knows neither its length nor that it may be a part.
local function file(headers, length)
  local status = headers:get("sf-http-status")
  if status ~= nil then
    headers:replace(":status", status)
    headers:remove("sf-http-status")
  end
  headers:replace("content-length", length)
  headers:remove("sf-content-length")
end

-- A service's error is a non-OK gRPC status. It stands in the headers: alone there when the service sent nothing
-- before it, or copied by the transcoder from the trailers, which still hold the rest.
function envoy_on_response(handle)
  local headers = handle:headers()
  local grpc_status = headers:get("grpc-status")
  if grpc_status == nil or grpc_status == "0" then
    local length = headers:get("sf-content-length")
    if length ~= nil then
      file(headers, length)
    end
    return
  end
  handle:body(true)
  local trailers = handle:trailers()
  headers = handle:headers()
  local status, text = described(headers)
  if trailers ~= nil then
    if text == nil then
      status, text = described(trailers)
    end
    for _, name in ipairs(PASSED_ON) do
      local value = trailers:get(name)
      if value ~= nil then
        headers:replace(name, value)
      end
    end
  end
  if status == nil or text == nil then
    local reply = STATUS[tonumber(grpc_status)] or STATUS[2]
    status = reply.status
    text = format(reply.body, headers:get("x-request-id") or "")
    if reply.retry_after ~= nil and headers:get("retry-after") == nil then
      headers:replace("retry-after", reply.retry_after)
    end
  end
  handle:body(true):setBytes(text)
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
  headers:replace("content-length", tostring(#text))
  headers:remove("sf-http-status")
  headers:remove("sf-http-body")
end
