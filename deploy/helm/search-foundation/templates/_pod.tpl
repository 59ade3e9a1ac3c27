{{/* Parts that pods of several kinds share. */}}

{{/*
Constraints that spread one component over zones and nodes: dict root, component, pool, spread, kind. During an update of
a Deployment the new pods are spread among themselves, not around the old ones that go.
*/}}
{{- define "sf.topologySpread" -}}
{{- $args := . -}}
{{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: {{ $args.spread.whenUnsatisfiable }}
  labelSelector:
    matchLabels:
      {{- include "sf.selectorLabels" $args | nindent 6 }}
  {{- if eq $args.kind "Deployment" }}
  matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end -}}

{{/* Metadata of a pod: dict root, component, pool, podLabels, podAnnotations, checksums (text to hash, by name), metricsPort. */}}
{{- define "sf.podMetadata" -}}
{{- $annotations := dict -}}
{{- range $name, $text := .checksums -}}
{{- $_ := set $annotations (printf "checksum/%s" $name) (sha256sum $text) -}}
{{- end -}}
{{- if and .root.Values.metrics.scrapeAnnotations .metricsPort -}}
{{- $_ := set $annotations "prometheus.io/scrape" "true" -}}
{{- $_ := set $annotations "prometheus.io/port" (toString .metricsPort) -}}
{{- $_ := set $annotations "prometheus.io/path" .metricsPath -}}
{{- end -}}
labels:
  {{- include "sf.labels" (merge (dict "labels" .podLabels "onPods" true) (omit . "labels")) | nindent 2 }}
{{- with merge $annotations .podAnnotations .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What every pod spec of the chart begins with: root, with account where it is not that of the release. */}}
{{- define "sf.podBase" -}}
serviceAccountName: {{ .account | default (include "sf.serviceAccountName" .) }}
automountServiceAccountToken: false
# Service links would put SF_* variables of its own into a release called "sf".
enableServiceLinks: false
{{- with .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{/*
Where pods go and whom they know: dict with nodeSelector, tolerations, affinity, priorityClassName, schedulerName,
runtimeClassName, dnsConfig, hostAliases.
*/}}
{{- define "sf.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Where the pods of a pool go: on nodes that have its device. */}}
{{- define "sf.poolPlacement" -}}
{{- $gpu := eq .device.type "gpu" -}}
{{- $nodeSelector := deepCopy .nodeSelector -}}
{{- $tolerations := .tolerations -}}
{{- if $gpu -}}
{{- with .device.product -}}
{{- $_ := set $nodeSelector $.device.productLabel . -}}
{{- end -}}
{{- $tolerations = append $tolerations (dict "key" .device.resourceName "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- include "sf.placement" (merge (dict
  "runtimeClassName" ($gpu | ternary .device.runtimeClassName "")
  "nodeSelector" $nodeSelector
  "tolerations" $tolerations) .) -}}
{{- end -}}

{{/*
A container that has weights in the volume `models` when it ends: dict root, pool, name, image, models, waits (whether
another one fetches them), and either configMap (name of the pool's) or environment (a dict).
*/}}
{{- define "sf.fetch" -}}
{{- $token := .pool.prefetch.tokenSecret }}
name: {{ .name }}
image: {{ .image }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - models
  {{- if .waits }}
  - wait
  {{- else }}
  - pull
  - --missing
  {{- if .pool.prefetch.acceptLicenses }}
  - --accept-license
  {{- end }}
  {{- end }}
  {{- toYaml .models | nindent 2 }}
{{- if or .configMap .pool.extraEnvFrom }}
envFrom:
  {{- with .configMap }}
  - configMapRef:
      name: {{ . }}
  {{- end }}
  {{- with .pool.extraEnvFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- if or .environment (and $token.name (not .waits)) .pool.extraEnv }}
env:
  {{- range $name, $value := .environment }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
  {{- if and $token.name (not .waits) }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ $token.name }}
        key: {{ $token.key }}
  {{- end }}
  {{- with .pool.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
resources:
  {{- toYaml .pool.prefetch.resources | nindent 2 }}
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
volumeMounts:
  - name: models
    mountPath: /models
    {{- if .waits }}
    readOnly: true
    {{- end }}
  - name: tmp
    mountPath: /tmp
  {{- if .root.Values.catalog }}
  - name: catalog
    mountPath: /etc/search-foundation/catalog
    readOnly: true
  {{- end }}
  {{- with .pool.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Pod template of a pool: dict root, pool. */}}
{{- define "sf.poolPod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $pool := .pool -}}
{{- $image := include "sf.image" (dict "root" $root "device" $pool.device.type "own" $pool.image) -}}
{{- $context := toYaml $values.containerSecurityContext -}}
{{- $names := dict "root" $root "component" "pool" "pool" $pool.name -}}
{{- $keysSecret := include "sf.keysSecret" $root -}}
{{- $checksums := dict "config" (include "sf.poolEnvironment" .) -}}
{{- with $values.catalog -}}
{{- $_ := set $checksums "catalog" (toJson .) -}}
{{- end -}}
{{- $prefetch := and $pool.prefetch.enabled (not $pool.modelCache.readOnly) (ne $pool.modelCache.type "image") -}}
metadata:
  {{- include "sf.podMetadata" (merge (dict "podLabels" $pool.podLabels "podAnnotations" $pool.podAnnotations "checksums" $checksums "metricsPort" 9090 "metricsPath" "/metrics") $names) | nindent 2 }}
spec:
  {{- include "sf.podBase" $root | nindent 2 }}
  {{- with include "sf.poolPlacement" $pool | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if $pool.topologySpread.enabled }}
  topologySpreadConstraints:
    {{- include "sf.topologySpread" (merge (dict "spread" $pool.topologySpread "kind" ($pool.stateful | ternary "StatefulSet" "Deployment")) $names) | trim | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $pool.drain.preStopSeconds $pool.drain.graceSeconds 5 }}
  {{- if or $pool.initContainers $prefetch }}
  initContainers:
    {{- with $pool.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $prefetch }}
    - {{ include "sf.fetch" (dict "root" $root "pool" $pool "name" "prefetch" "image" $image "models" $pool.models "configMap" $pool.fullname "waits" $pool.modelCache.warmUp.enabled) | nindent 6 | trim }}
    {{- end }}
  {{- end }}
  containers:
    - name: serve
      image: {{ $image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args:
        - serve
        {{- toYaml $pool.capabilities | nindent 8 }}
      envFrom:
        - configMapRef:
            name: {{ $pool.fullname }}
        {{- if and $values.objectStore.existingSecret (has "batch" $pool.capabilities) }}
        - secretRef:
            name: {{ $values.objectStore.existingSecret }}
        {{- end }}
        {{- with $pool.extraEnvFrom }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        {{- include "sf.poolContainerEnv" . | trim | nindent 8 }}
      ports:
        - name: grpc
          containerPort: 50051
        - name: metrics
          containerPort: 9090
      {{- $ready := include "sf.poolProbe" (set (omit . "path") "path" "/ready") }}
      startupProbe:
        {{- $ready | nindent 8 }}
        {{- toYaml $pool.probes.startup | nindent 8 }}
      readinessProbe:
        {{- $ready | nindent 8 }}
        {{- toYaml $pool.probes.readiness | nindent 8 }}
      livenessProbe:
        {{- include "sf.poolProbe" (set (omit . "path") "path" "/live") | nindent 8 }}
        {{- toYaml $pool.probes.liveness | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ $pool.drain.preStopSeconds | int | quote }}]
      resources:
        {{- include "sf.poolResources" $pool | nindent 8 }}
      securityContext:
        {{- $context | nindent 8 }}
      volumeMounts:
        - name: models
          mountPath: /models
          readOnly: true
          {{- if and (eq $pool.modelCache.type "image") $pool.modelCache.path }}
          subPath: {{ trimPrefix "/" $pool.modelCache.path }}
          {{- end }}
        - name: data
          mountPath: /var/lib/search-foundation
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        {{- if $keysSecret }}
        - name: keys
          mountPath: /etc/search-foundation/keys
          readOnly: true
        {{- end }}
        {{- if $values.mtls.enabled }}
        - name: tls
          mountPath: /etc/search-foundation/tls
          readOnly: true
        {{- end }}
        {{- if $values.catalog }}
        - name: catalog
          mountPath: /etc/search-foundation/catalog
          readOnly: true
        {{- end }}
        {{- with $pool.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $pool.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: models
      {{- include "sf.modelVolume" $pool | nindent 6 }}
    - name: data
      {{- if and $pool.keepsFiles $pool.persistence.enabled }}
      persistentVolumeClaim:
        claimName: {{ $pool.persistence.existingClaim | default (printf "%s-data" $pool.fullname) }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ $pool.tmpSize }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $pool.shmSize }}
    {{- if $keysSecret }}
    - name: keys
      secret:
        secretName: {{ $keysSecret }}
    {{- end }}
    {{- if $values.mtls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "sf.mtlsSecret" (dict "root" $root "side" "pool") }}
    {{- end }}
    {{- if $values.catalog }}
    - name: catalog
      configMap:
        name: {{ include "sf.fullname" $root }}-catalog
    {{- end }}
    {{- with $pool.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Environment of the serving container that a ConfigMap cannot hold: dict root, pool. */}}
{{- define "sf.poolContainerEnv" -}}
{{- $root := .root }}
{{- range $store, $variable := dict "database" "SF_DATABASE_URL" "redis" "SF_REDIS_URL" }}
{{- with include "sf.storeSecret" (dict "root" $root "store" $store) }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ (get $root.Values $store).secretKey }}
{{- end }}
{{- end }}
{{- if has "batch" .pool.capabilities }}
{{- with $root.Values.webhooks.existingSecret }}
- name: SF_WEBHOOK_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $root.Values.webhooks.secretKey }}
{{- end }}
# A StatefulSet's pod comes back under its name, and goes on with what it had begun. Releases may share a database.
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: SF_WORKER_ID
  value: $(POD_NAME).{{ $root.Release.Namespace }}
{{- end }}
# Without a CPU limit the node's cores would be counted, not the pod's share: by the engine, and by libraries.
{{- range list "SF_CORES" "OMP_NUM_THREADS" }}
- name: {{ . }}
  valueFrom:
    resourceFieldRef:
      containerName: serve
      resource: requests.cpu
      divisor: "1"
{{- end }}
{{- if .pool.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .pool.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
How the kubelet asks a pool: dict root, pool, path. Its gRPC probes speak no TLS, so with mTLS it asks the
HTTP port that also has the metrics.
*/}}
{{- define "sf.poolProbe" -}}
{{- if .root.Values.mtls.enabled -}}
httpGet:
  path: {{ .path }}
  port: metrics
{{- else -}}
grpc:
  port: 50051
  {{- with include "sf.healthService" .pool }}
  service: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Resources with the device's GPUs added. */}}
{{- define "sf.poolResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if eq .device.type "gpu" -}}
{{- $gpus := dict .device.resourceName (int .device.count) -}}
{{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) -}}
{{- $_ := set $resources "requests" (merge (deepCopy $gpus) (default dict $resources.requests)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "sf.modelVolume" -}}
{{- with .modelCache -}}
{{- if eq .type "pvc" -}}
persistentVolumeClaim:
  claimName: {{ .existingClaim | default (printf "%s-models" (.shared | ternary $.release $.fullname)) }}
  {{- if .readOnly }}
  readOnly: true
  {{- end }}
{{- else if eq .type "image" -}}
image:
  reference: {{ .image }}
  pullPolicy: IfNotPresent
{{- else if eq .type "hostPath" -}}
hostPath:
  path: {{ .path }}
  type: {{ .readOnly | ternary "Directory" "DirectoryOrCreate" }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .size }}
{{- end -}}
{{- end -}}
{{- end -}}
