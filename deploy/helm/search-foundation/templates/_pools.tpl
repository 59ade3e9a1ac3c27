{{/*
The pools as the templates use them: every entry of .Values.pools over .Values.poolDefaults, with
  capabilities  always a list
  fullname      name of its objects
  release       prefix of the release's objects
  host          DNS name that resolves to its ready pods
  stateful      whether its pods need stable names: a StatefulSet
  keepsFiles    whether they keep files that must outlive them
  volume        whether the chart makes a claim for them; such a pool has one pod
  least         pods it never has fewer of
Use: {{ range (include "sf.pools" . | fromYaml).pools }}
*/}}
{{- define "sf.pools" -}}
{{- $root := . -}}
{{- $pools := list -}}
{{- range $given := .Values.pools -}}
{{- $pool := mergeOverwrite (deepCopy $root.Values.poolDefaults) (deepCopy $given) -}}
{{- $capabilities := kindIs "slice" $pool.capability | ternary $pool.capability (list $pool.capability) -}}
{{- $database := include "sf.storeSecret" (dict "root" $root "store" "database") -}}
{{- $batch := has "batch" $capabilities -}}
{{- $keepsFiles := or (and $batch (not (and $database $root.Values.objectStore.url))) (and (has "classify" $capabilities) (not $database)) -}}
{{- $fullname := printf "%s-%s" (include "sf.fullname" $root) $pool.name -}}
{{- $_ := set $pool "capabilities" $capabilities -}}
{{- $_ := set $pool "fullname" $fullname -}}
{{- $_ := set $pool "release" (include "sf.fullname" $root) -}}
{{- $_ := set $pool "host" (printf "%s.%s.svc.%s" $fullname $root.Release.Namespace $root.Values.clusterDomain) -}}
{{- $_ := set $pool "stateful" (or $batch $keepsFiles) -}}
{{- $_ := set $pool "keepsFiles" $keepsFiles -}}
{{- $_ := set $pool "volume" (and $keepsFiles $pool.persistence.enabled (not $pool.persistence.existingClaim)) -}}
{{- $_ := set $pool "least" (int ($pool.autoscaling.enabled | ternary $pool.autoscaling.minReplicas $pool.replicas)) -}}
{{- $_ := set $pool "settings" (mergeOverwrite (deepCopy $root.Values.settings) $pool.settings) -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- dict "pools" $pools | toYaml -}}
{{- end -}}

{{/* Names of the pools as the alternatives of a regular expression. */}}
{{- define "sf.poolNames" -}}
{{- $names := list -}}
{{- range .Values.pools }}{{ $names = append $names .name }}{{ end -}}
{{- join "|" $names -}}
{{- end -}}

{{/* Health service the probes ask for: the capability's own, or the whole process when there are several. */}}
{{- define "sf.healthService" -}}
{{- if eq (len .capabilities) 1 -}}
searchfoundation.v1.{{ first .capabilities | title }}Service
{{- end -}}
{{- end -}}

{{/* Environment of a pool's containers, as ConfigMap data: dict root, pool. */}}
{{- define "sf.poolEnvironment" -}}
{{- $values := .root.Values -}}
{{- $env := dict
  "SF_HOST" $values.listenAddress
  "SF_GRPC_PORT" "50051"
  "SF_METRICS_PORT" "9090"
  "SF_MODELS" (.pool.models | toJson)
  "SF_MODEL_DIR" "/models"
  "SF_DATA_DIR" "/var/lib/search-foundation"
  "SF_DEVICE" (eq .pool.device.type "gpu" | ternary "cuda" "cpu")
  "SF_GRACE_SECONDS" (toString (int .pool.drain.graceSeconds))
  "SF_AUTH" (toString $values.auth.enabled)
  "SF_TRUSTED_PROXIES" (toJson $values.gateway.networks)
  "HOME" "/tmp"
  "HF_HOME" "/tmp/huggingface" -}}
{{- if include "sf.keysSecret" .root -}}
{{- $_ := set $env "SF_KEYS_FILE" "/etc/search-foundation/keys/keys.yaml" -}}
{{- end -}}
{{- if $values.mtls.enabled -}}
{{- $_ := set $env "SF_TLS_CERT" "/etc/search-foundation/tls/tls.crt" -}}
{{- $_ := set $env "SF_TLS_KEY" "/etc/search-foundation/tls/tls.key" -}}
{{- $_ := set $env "SF_TLS_CLIENT_CA" "/etc/search-foundation/tls/ca.crt" -}}
{{- end -}}
{{- if and $values.objectStore.url (has "batch" .pool.capabilities) -}}
{{- $_ := set $env "SF_OBJECT_STORE" $values.objectStore.url -}}
{{- end -}}
{{- if $values.catalog -}}
{{- $_ := set $env "SF_CATALOG_FILE" "/etc/search-foundation/catalog/catalog.yaml" -}}
{{- end -}}
{{- with .pool.prefetch.hubEndpoint -}}
{{- $_ := set $env "HF_ENDPOINT" . -}}
{{- end -}}
{{- range $key, $value := .pool.settings -}}
{{- $_ := set $env (printf "SF_%s" (upper $key)) (kindIs "string" $value | ternary (toString $value) (toJson $value)) -}}
{{- end -}}
{{- toYaml $env -}}
{{- end -}}

{{/*
Environment of the gateway's containers: what rendering and draining take from the settings.
The drain's time counts from its beginning, so it holds both parts.
*/}}
{{- define "sf.gatewayEnvironment" -}}
{{- $values := .Values -}}
{{- $drain := $values.gateway.drain -}}
{{- $env := dict
  "SF_ADMIN_PORT" "9901"
  "SF_DRAIN_SECONDS" (toString (int $drain.preStopSeconds))
  "SF_GRACE_SECONDS" (toString (add $drain.preStopSeconds $drain.graceSeconds)) -}}
{{- $_ := set $env "SF_CATALOG_FILE" "/etc/search-foundation/gateway/catalog.yaml" -}}
{{- range $name := list "max_items" "max_documents" "max_classify_items" "chat_max_answer_tokens" -}}
{{- with include "sf.largestSetting" (dict "root" $ "name" $name) -}}
{{- $_ := set $env (printf "SF_%s" (upper $name)) . -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* What writes the files that Envoy reads: dict root, environment. */}}
{{- define "sf.gatewayFiles" -}}
image: {{ include "sf.image" (dict "root" .root "device" "cpu") }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  {{- .environment | nindent 2 }}
resources:
  requests:
    cpu: 10m
    memory: 128Mi
  limits:
    memory: 512Mi
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
volumeMounts:
  - name: topology
    mountPath: /etc/search-foundation/gateway
    readOnly: true
  - name: run
    mountPath: /run/search-foundation
  - name: tmp
    mountPath: /tmp
  {{- if eq .root.Values.gateway.endpoints "slices" }}
  - name: account
    mountPath: /var/run/secrets/kubernetes.io/serviceaccount
    readOnly: true
  {{- end }}
{{- end -}}

{{/* The catalogue of the gateway: that of the pools, and the aliases that they have in their settings. */}}
{{- define "sf.gatewayCatalog" -}}
{{- $aliases := .Values.catalog.aliases | default dict | deepCopy -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- $aliases = mergeOverwrite $aliases (.settings.model_aliases | default dict) -}}
{{- end -}}
{{- merge (dict "aliases" $aliases) .Values.catalog | toYaml -}}
{{- end -}}

{{/* What only a restart of Envoy takes up of a topology: ports of its own, threads and memory. */}}
{{- define "sf.bootstrapOf" -}}
{{- dict
  "own" (pick . "admin" "metrics" "workers")
  "limits" (pick (.limits | default dict) "max_connections" "max_heap_bytes") | toJson -}}
{{- end -}}

{{/*
The largest value that pools have for one of the settings that the gateway has too, empty when all have the default:
dict root, name.
*/}}
{{- define "sf.largestSetting" -}}
{{- $name := .name -}}
{{- $defaults := dict "max_items" 2048 "max_documents" 2048 "max_classify_items" 512 "chat_max_answer_tokens" 8192 "max_body_bytes" 67108864 "max_text_body_bytes" 16777216 "request_timeout_seconds" 60 -}}
{{- $given := false -}}
{{- $most := 0.0 -}}
{{- range (include "sf.pools" .root | fromYaml).pools -}}
{{- $given = or $given (hasKey .settings $name) -}}
{{- $most = maxf $most (float64 (get (merge (dict) .settings $defaults) $name)) -}}
{{- end -}}
{{- if $given }}{{ toJson $most }}{{ end -}}
{{- end -}}

{{/* The topology of the gateway, made from the same pools. It lets through what one of them would take. */}}
{{- define "sf.topology" -}}
{{- $values := .Values -}}
{{- $pools := list -}}
{{- $patience := 1 -}}
{{- $failures := 1 -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- $patience = max $patience .probes.readiness.timeoutSeconds -}}
{{- $failures = max $failures .probes.readiness.failureThreshold -}}
{{- $entry := dict "name" .name "capabilities" .capabilities "models" .models "weight" (int .weight) -}}
{{- if eq $values.gateway.endpoints "slices" -}}
{{- $entry = merge $entry (dict "service" (printf "%s:50051" .fullname) "server_name" .host) -}}
{{- else -}}
{{- $entry = merge $entry (dict "addresses" (list (printf "%s:50051" .host))) -}}
{{- end -}}
{{- $pools = append $pools $entry -}}
{{- end -}}
{{- $listener := dict "host" $values.listenAddress "port" 8080 -}}
{{- $grpc := dict "host" $values.listenAddress "port" 50051 -}}
{{- if $values.gateway.tls.enabled -}}
{{- $tls := dict "certificate" "/etc/search-foundation/tls/tls.crt" "private_key" "/etc/search-foundation/tls/tls.key" -}}
{{- $_ := set $listener "tls" $tls -}}
{{- $_ := set $grpc "tls" $tls -}}
{{- end -}}
{{- $topology := dict
  "listener" $listener
  "admin" (dict "host" "127.0.0.1" "port" 9901)
  "metrics" (dict "host" $values.listenAddress "port" 9090)
  "pools" $pools
  "health_check" (dict "timeout" $patience "unhealthy_after" $failures "active" (ne $values.gateway.endpoints "slices"))
  "workers" (int $values.gateway.concurrency) -}}
{{- if $values.gateway.grpc.enabled -}}
{{- $_ := set $topology "grpc_listener" $grpc -}}
{{- end -}}
{{- if $values.mtls.enabled -}}
{{- $_ := set $topology "services_tls" (dict
  "ca" "/etc/search-foundation/mtls/ca.crt"
  "certificate" "/etc/search-foundation/mtls/tls.crt"
  "private_key" "/etc/search-foundation/mtls/tls.key") -}}
{{- end -}}
{{- $limits := dict -}}
{{- range $name := list "max_body_bytes" "max_text_body_bytes" -}}
{{- with include "sf.largestSetting" (dict "root" $ "name" $name) -}}
{{- $_ := set $limits $name (int64 .) -}}
{{- end -}}
{{- end -}}
{{- with ($values.gateway.resources.limits | default dict).memory -}}
{{- /* Envoy sheds load before the kernel would end it. */ -}}
{{- $_ := set $limits "max_heap_bytes" (mulf 0.85 (float64 (include "sf.bytes" .)) | int64) -}}
{{- end -}}
{{- $_ := set $topology "limits" $limits -}}
{{- with include "sf.largestSetting" (dict "root" . "name" "request_timeout_seconds") -}}
{{- $_ := set $topology "timeouts" (dict "request" (float64 .)) -}}
{{- end -}}
{{- mergeOverwrite $topology (deepCopy $values.gateway.topology) | toYaml -}}
{{- end -}}
