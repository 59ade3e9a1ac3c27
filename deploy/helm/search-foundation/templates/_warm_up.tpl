{{/*
What fills model caches ahead of the pods. An entry has
  kind      Job (a claim) or DaemonSet (a folder of each node)
  name      of its object; a Job's gets a hash behind it, since Kubernetes never changes one
  names     component and pool of its labels
  pool      the pool, or poolDefaults for the claim that several share
  models    what it fetches
  aliases   names of the site's own that models may be given by
*/}}
{{- define "sf.warmUps" -}}
{{- $root := . -}}
{{- $found := list -}}
{{- $shared := list -}}
{{- $aliases := dict -}}
{{- range (include "sf.pools" . | fromYaml).pools -}}
{{- if .modelCache.warmUp.enabled -}}
{{- $models := concat .models .modelCache.warmUp.models | uniq -}}
{{- if and (eq .modelCache.type "pvc") .modelCache.shared (not .modelCache.existingClaim) -}}
{{- $shared = concat $shared $models | uniq -}}
{{- $aliases = merge $aliases (.settings.model_aliases | default dict) -}}
{{- else -}}
{{- $found = append $found (dict
  "kind" (eq .modelCache.type "pvc" | ternary "Job" "DaemonSet")
  "name" (printf "%s-warm-up" .fullname)
  "names" (dict "component" "warm-up" "pool" .name)
  "pool" . "models" $models "aliases" (.settings.model_aliases | default dict)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $shared -}}
{{- $release := include "sf.fullname" . -}}
{{- $pool := merge (dict "name" "models" "release" $release "fullname" $release) (deepCopy .Values.poolDefaults) -}}
{{- $_ := set $pool.modelCache "shared" true -}}
{{- $_ := set $pool.modelCache "type" "pvc" -}}
{{- $found = append $found (dict
  "kind" "Job"
  "name" (printf "%s-models-warm-up" $release)
  "names" (dict "component" "models")
  "pool" $pool "models" $shared "aliases" $aliases) -}}
{{- end -}}
{{- dict "warmUps" $found | toYaml -}}
{{- end -}}

{{/* Pod template of one of them: dict root, warmUp. */}}
{{- define "sf.warmUpPod" -}}
{{- $root := .root -}}
{{- $pool := .warmUp.pool -}}
{{- $job := eq .warmUp.kind "Job" -}}
{{- /* On the pods' own nodes it brings their image as well. */ -}}
{{- $image := include "sf.image" (dict "root" $root "device" ($job | ternary "cpu" $pool.device.type) "own" $pool.image) -}}
{{- $environment := dict "HOME" "/tmp" "HF_HOME" "/tmp/huggingface" "SF_DATA_DIR" "/tmp/data" "SF_MODEL_DIR" "/models" -}}
{{- with $pool.prefetch.hubEndpoint -}}
{{- $_ := set $environment "HF_ENDPOINT" . -}}
{{- end -}}
{{- with .warmUp.aliases -}}
{{- $_ := set $environment "SF_MODEL_ALIASES" (toJson .) -}}
{{- end -}}
{{- $checksums := dict -}}
{{- with $root.Values.catalog -}}
{{- $_ := set $environment "SF_CATALOG_FILE" "/etc/search-foundation/catalog/catalog.yaml" -}}
{{- $_ := set $checksums "catalog" (toJson .) -}}
{{- end -}}
{{- $names := merge (dict "root" $root) .warmUp.names -}}
metadata:
  {{- include "sf.podMetadata" (merge (dict "podLabels" $pool.podLabels "podAnnotations" $pool.podAnnotations "checksums" $checksums) $names) | nindent 2 }}
spec:
  {{- include "sf.podBase" $root | nindent 2 }}
  {{- with $job | ternary (include "sf.placement" $pool) (include "sf.poolPlacement" $pool) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  # What was fetched when it ends is taken up again.
  terminationGracePeriodSeconds: 1
  {{- if $job }}
  restartPolicy: OnFailure
  {{- end }}
  {{ $job | ternary "containers" "initContainers" }}:
    - {{ include "sf.fetch" (dict "root" $root "pool" $pool "name" "fetch" "image" $image "models" .warmUp.models "environment" $environment) | nindent 6 | trim }}
  {{- if not $job }}
  containers:
    # A DaemonSet's pods stay; nodes that come later get theirs.
    - name: stay
      image: {{ $image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [sleep, infinity]
      resources:
        requests:
          cpu: 1m
          memory: 8Mi
        limits:
          memory: 16Mi
      securityContext:
        {{- toYaml $root.Values.containerSecurityContext | nindent 8 }}
  {{- end }}
  volumes:
    - name: models
      {{- include "sf.modelVolume" $pool | nindent 6 }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ $pool.tmpSize }}
    {{- if $root.Values.catalog }}
    - name: catalog
      configMap:
        name: {{ include "sf.fullname" $root }}-catalog
    {{- end }}
    {{- with $pool.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
